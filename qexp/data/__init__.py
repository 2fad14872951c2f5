"""Images to tensors: data sets, image folders, sampling. Feeds training, quantization and measurement."""
