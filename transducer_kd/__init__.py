"""Transducer speech recognisers made small enough for a device, and what it cost in accuracy."""
