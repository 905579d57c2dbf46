"""Optional integrations, one module each. Each can be imported without what it integrates; using it says what
to install.
"""
