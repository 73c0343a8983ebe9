"""What the library costs on its hot paths, as ratios to floors measured in the same run.

Each module measures one path: `results()` gives its rows, and run alone it prints them.
``python -m benchmarks`` runs all of them.
"""
