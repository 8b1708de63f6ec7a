"""A trained phase for a device: ONNX files, their quantisation, what runs them, and the proof that all
agree.
"""
