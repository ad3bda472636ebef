"""Measuring memories beside what people use instead: learners, books, statistics, reports."""
