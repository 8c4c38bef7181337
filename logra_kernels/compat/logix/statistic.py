"""LogIX's plugins, by the names that `setup` also takes as strings."""

Log = "log"
Mean = "mean"
Variance = "variance"
Covariance = "covariance"
CorrectedEigval = "corrected_eigval"

__all__ = ["CorrectedEigval", "Covariance", "Log", "Mean", "Variance"]
