"""The jobs: train, quantize, measure, decide, report, promote; and resuming them."""
