"""The exercises of the lessons, a module a lesson: functions that judge an answer and say why.

They stand here and not in the notebooks, so that no page shows its answer.  An exercise is public, takes the answer and what
it needs of the lesson, and returns a ``Verdict``; it computes what is right from what it is given, so that it follows the
lesson's parameters.  A run that was asked for is judged from its directory.
"""
