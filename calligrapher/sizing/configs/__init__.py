"""The public configs of FLUX.1-Fill-dev and of SigLIP so400m's vision tower; no weights.

Their folders are laid out as `model.base` and `model.siglip` are, and read when those are not
there.
"""

from pathlib import Path

BASE, SIGLIP = Path(__file__).parent / "flux-fill", Path(__file__).parent / "siglip"
