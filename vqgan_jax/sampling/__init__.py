"""Drawing codes from a transformer: cached decoding, filters, guidance, likelihoods."""
