"""Other places to run in: ComfyUI, programs without Python, the Hugging Face Hub, ONNX.

Nothing here is imported by the package itself; every stack is imported where it is used.
"""
