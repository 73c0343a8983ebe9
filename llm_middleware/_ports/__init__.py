"""Every real wait of the library: the core is written once and awaits only what a port hands it."""
