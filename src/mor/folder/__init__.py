"""What a model folder holds, read without Transformers' modelling code.

Importing that code takes longer than all else that a server needs before its first answer, so
nothing in here asks for it where a folder can be read without.
"""
