//! Makes messages and the service out of the plugin's own kms.proto.

const PROTO: &str = "../../../kms.proto";

fn main() {
    tonic_prost_build::configure()
        .build_client(false)
        .compile_protos(&[PROTO], &["../../.."])
        .expect("protoc makes Rust of kms.proto");
}
