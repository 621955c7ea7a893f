"""Training of the policy: its optimizer and the guard of updates, passes through the pipeline, the reference policy."""
