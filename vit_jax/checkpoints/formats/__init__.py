"""Files of arrays, a module per format: how one is recognized, checked, read and written."""
