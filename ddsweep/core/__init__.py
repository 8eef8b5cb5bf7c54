"""The engine: torch only, functional, no files, no printing, no globals. Devices and dtypes are arguments."""
