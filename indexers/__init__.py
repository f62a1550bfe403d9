"""Files into text, text into chunks, chunks into vectors, vectors into the tier."""
