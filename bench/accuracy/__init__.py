"""Accuracy studies: how well each curvature, damping and projection predicts retraining (linear datamodeling score).

python -m bench.accuracy --study digits
"""
