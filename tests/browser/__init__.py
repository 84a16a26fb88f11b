"""The notebooks as a reader sees them: in JupyterLab and in Voila, in a browser.  `pytest -m browser`."""
