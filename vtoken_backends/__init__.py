"""The built-in storage backends, one flat file each."""
