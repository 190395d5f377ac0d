"""Drawing: grids, sheets, curves."""
