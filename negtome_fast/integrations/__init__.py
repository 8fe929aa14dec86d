"""Other inference stacks, each built on `negtome_fast.Guidance`.

Nothing here is imported by the package itself; every stack is imported where it is used.
"""
