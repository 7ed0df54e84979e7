"""What a step costs: time, throughput, memory and decoded frames (docs/speed.md)."""
