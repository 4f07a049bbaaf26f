"""Graded exercises: one master a lab, from which students' and instructors' notebooks are made, and the grader."""
