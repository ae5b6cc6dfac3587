"""Networks: a 3D U-Net that returns logits and embeddings, Monte-Carlo dropout, and the teacher's moving average."""
