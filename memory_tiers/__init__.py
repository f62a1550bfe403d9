"""The tiers of memory: so far the long-term tier, on LanceDB with a FAISS hot index."""
