"""Images from TFDS or a folder, in batches of NumPy arrays, through tf.data."""
