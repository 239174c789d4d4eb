#!/usr/bin/python3
"""What the guide's blocks take for granted, as far as they need it; by the name under which this file is started:

kubectl, kubeadm    an API server that writes to etcd what its configuration says, under the running plugin's KEK
crictl              etcd's container, and the kubelet that starts the plugin's pod again
ssh                 another machine of these (boot.sh), as root
cluster             `etcd` starts one with certificates; `put NAME KIND` writes there: v2, v1, stranger or plain, what `object` prints

The real ones are in test/kube/cluster.
"""
import base64
import datetime
import ipaddress
import json
import os
import pathlib
import re
import socket
import subprocess
import sys

PKI = pathlib.Path('/etc/kubernetes/pki/etcd')
MANIFEST = pathlib.Path('/etc/kubernetes/manifests/kube-apiserver.yaml')
CONFIG = pathlib.Path('/etc/kubernetes/encryption/config.yaml')
CONFIGMAP = pathlib.Path('/var/lib/kubeadm-config')
SECRETS = '/registry/secrets/'
OBJECT = b'k8s\0\n\x0c\n\x02v1\x12\x06Secret' + bytes(range(256)) + b'\n'
FLAG = 'encryption-provider-config'
ADDRESS = '- --advertise-address=192.0.2.1\n'       # of that API server alone: kubeadm finds another one anew


def run(*argv, **how):
    return subprocess.run(argv, stdout=subprocess.PIPE, check=True, **how).stdout


def etcdctl(*argv, **how):
    return run('/usr/bin/etcdctl', '--endpoints', 'https://127.0.0.1:2379', '--cacert', PKI / 'ca.crt', '--cert', PKI / 'server.crt',
               '--key', PKI / 'server.key', *argv, env={'ETCDCTL_API': '3', 'PATH': os.environ['PATH']}, **how)


def put(key, kind):
    """Writes the object as an API server with this provider does."""
    sys.path.insert(0, '/test/test')
    import sealed
    value, name = OBJECT, (SECRETS + key).encode()
    if kind == 'stranger':
        value = sealed.etcd_v2(os.urandom(32), name, OBJECT)
    elif kind != 'plain':
        running = re.search(r'^key_id (\w+)', run('kmsplugin', 'probe', text=True), re.M)[1]
        kek = base64.b64decode(run('kmsplugin-ring', 'print', running))
        value = {'v2': sealed.etcd_v2, 'v1': sealed.etcd_v1}[kind](kek, name, OBJECT)
    etcdctl('put', SECRETS + key, input=value)


def kubectl(*argv):
    if argv[:2] == ('get', '--raw'):
        if FLAG not in MANIFEST.read_text():
            sys.exit('Error from server (NotFound): the server could not find the requested resource')
        run('kmsplugin', 'probe')
        print('ok', end='')
    elif argv[:2] == ('get', 'secrets'):
        print(json.dumps(etcdctl('get', '--prefix', SECRETS, '--keys-only', text=True).split()))
    elif argv[0] == 'replace':
        providers = re.findall(r'^      - (kms|identity):', CONFIG.read_text(), re.M)
        encrypts = FLAG in MANIFEST.read_text() and providers[0] == 'kms'
        for key in json.load(sys.stdin):
            put(key.removeprefix(SECRETS), 'v2' if encrypts else 'plain')
    elif argv[:4] == ('-n', 'kube-system', 'edit', 'configmap'):
        run('sh', '-c', os.environ['EDITOR'] + ' "$0"', CONFIGMAP)
    elif argv[:4] == ('-n', 'kube-system', 'get', 'configmap'):
        print(CONFIGMAP.read_text())
    else:
        sys.exit(f'kubectl: {argv}')


def kubeadm(*argv):
    assert argv[:5] == ('init', 'phase', 'control-plane', 'apiserver', '--config'), argv
    config = pathlib.Path(argv[5]).read_text()
    assert config.startswith('apiVersion: kubeadm.k8s.io/'), config
    MANIFEST.parent.mkdir(parents=True, exist_ok=True)
    MANIFEST.write_text(config)


def crictl(*argv):
    """A container that ends is started again by the kubelet."""
    if argv[0] == 'ps':
        print({'^etcd$': 'etcd-container', '^kmsplugin$': 'pod-container'}[argv[-1]])
    elif argv[:3] == ('exec', '-i', 'etcd-container'):
        os.execv('/usr/bin/etcdctl', argv[3:])
    elif argv == ('stop', 'pod-container'):
        run('systemctl', 'restart', 'pod.service')
    else:
        sys.exit(f'crictl: {argv}')


def ssh(machine, *argv):
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(f'/peers/{machine}.sock')
        peer.sendall(' '.join(argv).encode() + b'\n' + sys.stdin.buffer.read())
        peer.shutdown(socket.SHUT_WR)
        said = b''.join(iter(lambda: peer.recv(65536), b''))
    said, _, status = said.rpartition(b'\n')
    sys.stdout.buffer.write(said)
    sys.exit(int(status))


def certificate():
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, 'etcd')]), datetime.datetime.utcnow()
    made = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
            .not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
            .add_extension(x509.BasicConstraints(True, None), True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address('127.0.0.1'))]), False)
            .sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    PKI.mkdir(parents=True)
    for file, data in ('ca.crt', made), ('server.crt', made), ('server.key', key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption())):
        (PKI / file).write_bytes(data)


def cluster(verb, *argv):
    if verb == 'put':
        return put(*argv)
    if verb == 'object':
        return sys.stdout.buffer.write(OBJECT)
    certificate()
    CONFIGMAP.write_text('apiVersion: kubeadm.k8s.io/v1beta4\nkind: ClusterConfiguration\n')
    kubeadm('init', 'phase', 'control-plane', 'apiserver', '--config', CONFIGMAP)
    MANIFEST.write_text(MANIFEST.read_text() + ADDRESS)
    url = 'https://127.0.0.1:2379'
    run('systemd-run', '--quiet', '--unit=etcd-test', 'etcd', '--data-dir', '/var/lib/etcd-test', '--listen-client-urls', url,
        '--advertise-client-urls', url, '--client-cert-auth', f'--trusted-ca-file={PKI}/ca.crt', f'--cert-file={PKI}/server.crt',
        f'--key-file={PKI}/server.key')


try:
    globals()[pathlib.Path(sys.argv[0]).stem](*sys.argv[1:])
except subprocess.CalledProcessError as error:
    sys.exit(f'{sys.argv[0]}: {error}')
