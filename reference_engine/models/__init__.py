"""The mathematics of decoders: from token ids to logits. No I/O, no policy."""
