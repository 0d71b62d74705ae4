package pki

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

const (
	certBlock = "CERTIFICATE"
	keyBlock  = "PRIVATE KEY"
)

// pair is a key with its certificates, of which one that is made has one.
type pair struct {
	key   *ecdsa.PrivateKey
	certs []*x509.Certificate
}

// cert is the first of the certificates.
func (p pair) cert() *x509.Certificate { return p.certs[0] }

func (p pair) write(path string) error { return writePEM(path, p.key, p.certs) }

func readPair(path string) (pair, error) {
	key, certs, err := readPEM(path)
	return pair{key: key, certs: certs}, err
}

// writePEM replaces a file by a key and certificates, at once and durably; nobody but its owner may read it.
func writePEM(path string, key *ecdsa.PrivateKey, certs []*x509.Certificate) (err error) {
	data, err := keyPEM(key)
	if err != nil {
		return err
	}
	for _, c := range certs {
		data = append(data, pem.EncodeToMemory(&pem.Block{Type: certBlock, Bytes: c.Raw})...)
	}
	return writeSecret(path, data)
}

// writeSecret replaces a file, which nobody but its owner may read, at once and durably.
func writeSecret(path string, data []byte) (err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-") // 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	folder, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil // it is there, and as durable as this folder lets it be
	}
	_ = errors.Join(folder.Sync(), folder.Close()) // as well
	return nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// KeepKey reads the key that is kept in a file, or makes one and keeps it there: it is to outlive this process before anything is
// made of it.
func KeepKey(path string) (*ecdsa.PrivateKey, error) {
	data, err := readSecret(path)
	if errors.Is(err, fs.ErrNotExist) {
		return newKept(path)
	}
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(data)
	if block == nil || block.Type != keyBlock {
		return nil, fmt.Errorf("there is no key in %s: remove it", path)
	}
	key, err := parseKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w: remove it", path, err)
	}
	return key, nil
}

func newKept(path string) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make a key: %w", err)
	}
	text, err := keyPEM(key)
	if err == nil {
		err = writeSecret(path, text)
	}
	if err != nil {
		return nil, fmt.Errorf("keep a key: %w", err)
	}
	return key, nil
}

func keyPEM(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode the key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: keyBlock, Bytes: der}), nil
}

// readSecret reads a file that writeSecret wrote. One that others may read is refused: whoever could read it could be its owner.
func readSecret(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // it was only read
	info, err := f.Stat()            // of the file that is read, whatever becomes of its name
	if err != nil {
		return nil, err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s may be read by others (mode %04o); it holds a key: chmod 600 it", path, info.Mode().Perm())
	}
	return io.ReadAll(f)
}

// readPEM reads a file that writePEM wrote.
func readPEM(path string) (key *ecdsa.PrivateKey, certs []*x509.Certificate, err error) {
	data, err := readSecret(path)
	if err != nil {
		return nil, nil, err
	}
	key, certs, err = parsePEM(data)
	if err != nil {
		return nil, nil, fmt.Errorf("read %s: %w", path, err)
	}
	return key, certs, nil
}

var errOneKey = errors.New("there must be one key in it, an ECDSA P-256 one")

func parseKey(der []byte) (*ecdsa.PrivateKey, error) {
	found, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, errors.New("read the key: it is damaged") // the parser's words may show some of it
	}
	key, ok := found.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, errOneKey
	}
	return key, nil
}

// parsePEM reads one key and the certificates, of which the first must be the key's.
func parsePEM(data []byte) (key *ecdsa.PrivateKey, certs []*x509.Certificate, err error) {
	block, rest := pem.Decode(data)
	for ; block != nil; block, rest = pem.Decode(rest) {
		switch block.Type {
		case certBlock:
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, nil, fmt.Errorf("read a certificate: %w", err)
			}
			certs = append(certs, cert)
		case keyBlock:
			if key != nil {
				return nil, nil, errOneKey
			}
			if key, err = parseKey(block.Bytes); err != nil {
				return nil, nil, err
			}
		}
	}
	if len(bytes.TrimSpace(rest)) > 0 { // perhaps a root without which half of the grid isn't trusted
		return nil, nil, errors.New("it is cut off, or its last part is damaged")
	}
	if key == nil || len(certs) == 0 {
		return nil, nil, errors.New("there must be a key and a certificate in it")
	}
	if public, ok := certs[0].PublicKey.(*ecdsa.PublicKey); !ok || !public.Equal(key.Public()) {
		return nil, nil, errors.New("its first certificate isn't that of its key")
	}
	return key, certs, nil
}
