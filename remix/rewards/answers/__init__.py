"""Answers as mathematics, without computer algebra.

extract     whole response -> the text of the answer
normalise   the many spellings of one thing -> one spelling
numerals    numbers as they are written: groups of thousands, repeating decimals, bases, scientific notation
lex, parse  text -> tokens -> a tree of `Node`; what stands alone in it is in `primaries`
units       what stands behind a number
values      a tree of numbers -> an exact fraction, or its value at sample points
sets        intervals, unions and inequalities -> pieces of the real line
equations   equations, inequalities, assignments
compare     are two trees the same answer?

`extract`, `normalise` and `numerals` are linear in their input and cheap to import; the others see short texts only,
in a process that may be killed.
"""
