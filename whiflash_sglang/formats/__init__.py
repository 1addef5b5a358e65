"""Torch-only draft and target models: no SGLang, no CUDA; training and the server share them."""
