"""Triton kernels of NegToMe; needs torch, triton and the standard library only.

Importing this package does not import Triton; the modules that hold kernels do.
"""
