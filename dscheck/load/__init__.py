"""The life of a load: wanted regions, the byte ranges that hold them, verified bytes, and the agreement of all
ranks.
"""
