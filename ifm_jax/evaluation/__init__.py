"""What the frozen features hold: linear readouts on them."""
