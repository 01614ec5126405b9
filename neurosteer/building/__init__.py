"""Examples to artifact: reading, method, layers and calibration in one call."""
