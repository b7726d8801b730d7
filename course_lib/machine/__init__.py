"""This computer: set-up, doctor, JupyterLab, map of the stack."""
