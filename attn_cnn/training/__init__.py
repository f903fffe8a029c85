"""The machinery of a run: what follows from a config, the compiled steps, the workdir, the data, the devices."""
