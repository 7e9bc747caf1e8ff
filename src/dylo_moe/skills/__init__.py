"""Skills learned one after another: is it new, which expert, and the closed-form router."""
