"""How good reconstructions are, and how the codebook is used."""
