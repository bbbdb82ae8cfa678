"""Long sequences as streams: text as bytes or subwords, pixels of images."""
