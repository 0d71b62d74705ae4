package rpc

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/rs/zerolog"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// A stream ends with the certificate that it was begun with, whatever its handler does, and its caller is told so, which
// isn't on record as a refusal; one that was begun with a longer one goes on.
func TestStreamsEndWithTheirCertificate(t *testing.T) {
	for name, handler := range map[string]func(tailStream) error{
		"one that waits": func(s tailStream) error {
			<-s.Context().Done()
			return s.Context().Err()
		},
		"one that sends, and looks at nothing else": func(s tailStream) error {
			for {
				if err := s.Send(piece(1)); err != nil {
					return err
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			checkLeaks(t)
			a := newAuthority(t, gridID)
			audit, dir, _ := openAudit(t)
			goOn := make(chan struct{})
			srv := NewServer(zerolog.Nop(), nil, Guard{Credentials: held(t, a, pki.MasterIdentity(gridID, "m")), Audit: audit})
			sutrav1.RegisterGridMasterServer(srv, &streaming{tailLogs: func(s tailStream) error {
				if err := s.Send(piece(1)); err != nil {
					return err
				}
				if CallerOf(s.Context()).Name != "bob" {
					return handler(s)
				}
				<-goOn
				return s.Send(piece(1))
			}})
			endpoint := serve(t, srv, anyPort).endpoint
			client := func(own *pki.Holder) sutrav1.GridMasterClient {
				channel := Master(endpoint, Held(own), nil)
				t.Cleanup(channel.Close)
				return sutrav1.NewGridMasterClient(channel)
			}
			type end struct {
				pieces int
				err    error
			}
			others := make(chan end, 1)
			bob := client(held(t, a, pki.UserIdentity(gridID, "bob", sutrav1.Role_ROLE_VIEWER)))
			go func() {
				pieces, err := tail(t.Context(), bob)
				others <- end{pieces, err}
			}()

			short, err := a.Own(pki.UserIdentity(gridID, "anna", sutrav1.Role_ROLE_VIEWER), 3*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			own := &pki.Holder{}
			own.Set(short)
			anna := client(own)
			pieces, err := tail(t.Context(), anna)
			wantError(t, err, CertificateExpired, "TailLogs was broken off: the certificate that user anna began it with expired at "+short.Expires.UTC().Format(time.RFC3339))
			if pieces == 0 || AsError(err).Hint == "" || time.Now().Before(short.Expires) {
				t.Errorf("after %d pieces it says %v, %q", pieces, err, AsError(err).Hint)
			}
			if lines := records(t, filepath.Join(dir, refusedFile)); len(lines) > 0 {
				t.Errorf("on record as refused are %v", lines)
			}
			// What is begun later is refused, and on record.
			if _, err := tail(t.Context(), anna); ReasonOf(err) != Unauthenticated {
				t.Errorf("one that begins later: %v", err)
			}
			if lines := records(t, filepath.Join(dir, refusedFile)); len(lines) != 1 {
				t.Errorf("on record as refused are %v", lines)
			}
			close(goOn)
			if got := receive(t, "the other's end", others); got.err != nil || got.pieces != 2 {
				t.Errorf("the other's stream brought %d pieces, and %v", got.pieces, got.err)
			}
		})
	}
}
