"""Images as rows of 12,288 pixel values: bits per dimension at equal time, and completions."""
