"""Where cached answers are kept: one module per tier, each importing its driver only when it is used."""
