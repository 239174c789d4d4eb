//! peer is a KMS plugin as a Rust programmer writes one today: tonic for gRPC, ring for AES-256-GCM,
//! tokio's current-thread runtime, and nothing else. It does what the Go peer does.
//!
//!     peer SOCKET        KMS v2

use std::collections::HashMap;
use std::error::Error;

use ring::aead::{Aad, LessSafeKey, Nonce, UnboundKey, AES_256_GCM, NONCE_LEN};
use ring::digest::{digest, SHA256};
use ring::rand::{SecureRandom, SystemRandom};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use v2::key_management_service_server::{KeyManagementService, KeyManagementServiceServer};
use v2::{
    DecryptRequest, DecryptResponse, EncryptRequest, EncryptResponse, StatusRequest,
    StatusResponse,
};

#[allow(dead_code)] // what lies in etcd is in kms.proto, too
mod v2 {
    tonic::include_proto!("v2");
}

const STREAMS: u32 = 256; // a connection, as the plugin allows; hyper's default is 200

struct Plugin {
    key: LessSafeKey,
    key_id: String,
    random: SystemRandom,
}

impl Plugin {
    fn new() -> Result<Self, ring::error::Unspecified> {
        let random = SystemRandom::new();
        let mut kek = [0; 32];
        random.fill(&mut kek)?;
        let sum = digest(&SHA256, &kek);
        let key_id = sum.as_ref()[..16]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &kek)?);
        Ok(Self {
            key,
            key_id,
            random,
        })
    }

    /// Nonce, ciphertext and tag, in one allocation.
    fn seal(&self, plaintext: &[u8]) -> Result<Vec<u8>, Status> {
        let failed = |_| Status::internal("sealing failed");
        let mut nonce = [0; NONCE_LEN];
        self.random.fill(&mut nonce).map_err(failed)?;
        let mut sealed = Vec::with_capacity(NONCE_LEN + plaintext.len() + AES_256_GCM.tag_len());
        sealed.extend_from_slice(&nonce);
        sealed.extend_from_slice(plaintext);
        let nonce = Nonce::assume_unique_for_key(nonce);
        let tag = self
            .key
            .seal_in_place_separate_tag(nonce, Aad::empty(), &mut sealed[NONCE_LEN..])
            .map_err(failed)?;
        sealed.extend_from_slice(tag.as_ref());
        Ok(sealed)
    }

    fn open(&self, mut sealed: Vec<u8>) -> Result<Vec<u8>, Status> {
        let refused = |_| Status::invalid_argument("the ciphertext does not open");
        if sealed.len() < NONCE_LEN {
            return Err(Status::invalid_argument("the ciphertext is too short"));
        }
        let nonce = Nonce::try_assume_unique_for_key(&sealed[..NONCE_LEN]).map_err(refused)?;
        let length = self
            .key
            .open_within(nonce, Aad::empty(), &mut sealed, NONCE_LEN..)
            .map_err(refused)?
            .len();
        sealed.truncate(length);
        Ok(sealed)
    }
}

#[tonic::async_trait]
impl KeyManagementService for Plugin {
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        Ok(Response::new(StatusResponse {
            version: "v2".into(),
            healthz: "ok".into(),
            key_id: self.key_id.clone(),
        }))
    }

    async fn encrypt(
        &self,
        request: Request<EncryptRequest>,
    ) -> Result<Response<EncryptResponse>, Status> {
        Ok(Response::new(EncryptResponse {
            ciphertext: self.seal(&request.get_ref().plaintext)?,
            key_id: self.key_id.clone(),
            annotations: HashMap::new(),
        }))
    }

    async fn decrypt(
        &self,
        request: Request<DecryptRequest>,
    ) -> Result<Response<DecryptResponse>, Status> {
        let request = request.into_inner();
        if request.key_id != self.key_id {
            return Err(Status::not_found("unknown key_id"));
        }
        Ok(Response::new(DecryptResponse {
            plaintext: self.open(request.ciphertext)?,
        }))
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args_os().nth(1).ok_or("usage: peer SOCKET")?;
    let plugin = Plugin::new().map_err(|_| "no random bytes")?;
    let listener = UnixListener::bind(path)?;
    Server::builder()
        .max_concurrent_streams(STREAMS)
        .add_service(KeyManagementServiceServer::new(plugin))
        .serve_with_incoming(UnixListenerStream::new(listener))
        .await?;
    Ok(())
}
