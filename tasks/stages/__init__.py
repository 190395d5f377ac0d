"""The stages, one plain function each: artifacts in, an artifact out."""
