"""Every drawing, and the live view."""
