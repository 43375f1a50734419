"""What `gpu_protocol.py` does: its stages by the question that they answer, and what their record says."""
