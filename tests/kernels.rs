//! What kernels and tiers told of the same packets, side by side: `cargo xtask test` runs it when all have told.

#[test]
fn kernels_and_tiers_agree() {
    tests::agreement::kernels_agree();
}
