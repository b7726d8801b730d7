"""This computer: set-up, doctor, JupyterLab, map of the stack; `gpu/` checks one GPU."""
