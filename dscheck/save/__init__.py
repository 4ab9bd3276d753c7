"""The life of a save: claims, the plan that they merge into, the data file of this rank, and the arrival that
commits.
"""
