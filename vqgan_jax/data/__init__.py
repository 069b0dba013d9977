"""Images from data sets and folders, by index; batches on the devices."""
