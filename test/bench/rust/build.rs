//! Makes messages and services out of the plugin's own kms.proto.

use tonic_build::manual;

const PROTO: &str = "../../../kms.proto";

/// kms.proto has the v1beta1 messages, nested in one called V1beta1, but not that service.
fn method(name: &str) -> manual::Method {
    manual::Method::builder()
        .name(name.to_lowercase())
        .route_name(name)
        .input_type(format!("crate::v2::v1beta1::{name}Request"))
        .output_type(format!("crate::v2::v1beta1::{name}Response"))
        .codec_path("tonic_prost::ProstCodec")
        .build()
}

fn main() {
    tonic_prost_build::configure()
        .build_client(false)
        .compile_protos(&[PROTO], &["../../.."])
        .expect("protoc makes Rust of kms.proto");

    let v1beta1 = manual::Service::builder()
        .name("KeyManagementService")
        .package("v1beta1")
        .method(method("Version"))
        .method(method("Encrypt"))
        .method(method("Decrypt"))
        .build();
    manual::Builder::new()
        .build_client(false)
        .compile(&[v1beta1]);
}
