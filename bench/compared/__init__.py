"""The operator, its rivals, and the shapes and models that they run on.

shapes        hidden states of models, and random tokens to fill them
baselines     the authors' function, split versions, bare products
rivals        fused assignments of other packages
candidates    all of them by name, as functions of the tokens
denoisers     whole models
predictions   times that were expected before anything was measured
"""
